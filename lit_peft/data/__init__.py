"""Data modules: what is read, how it is rendered, masked, packed and handed out."""

"""Adapter folders of other libraries, told in our words: adapter-hub's `adapters`, and pyreft."""

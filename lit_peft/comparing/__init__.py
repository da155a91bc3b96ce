"""What `lit-peft compare` is made of: the runs and their sizes, warm processes, the table, the picture."""

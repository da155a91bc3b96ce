"""The command line: what is asked (request), LightningCLI around it (app), run folders, complaints, the last screen."""

"""Pictures and tables of patterns and runs, for the terminal, notebooks and reports."""

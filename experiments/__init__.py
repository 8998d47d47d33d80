"""Claims of the pruning papers, rerun in small: `python experiments/run.py` makes README.md beside this file."""

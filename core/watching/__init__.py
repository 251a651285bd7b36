"""What people and programs watch a federation by: pages in the terminal, metrics, logs, traces."""

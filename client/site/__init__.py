"""The site's own commands: make its key, check before anyone waits, start the SuperNode."""

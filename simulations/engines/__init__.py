"""Where a simulated federation runs: in this process, or on Flower's runtime. The code of a site is the same."""

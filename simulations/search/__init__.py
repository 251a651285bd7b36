"""Which of AutoPEFT's configurations to take, by Bayesian optimisation on public records."""

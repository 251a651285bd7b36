"""A whole federation on one machine: scenarios, how records are dealt to sites, and the engines that run it."""

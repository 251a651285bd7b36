"""The site's side of watching: what it was asked, what left, what was refused, and the budget that is left."""

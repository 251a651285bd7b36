"""What runs at a site: its data, its training under its own privacy plan, its evaluation, and its Flower ClientApp."""

"""What a coordinator and its sites share before any round: certificates, keys, kits, the roster, Flower's processes."""

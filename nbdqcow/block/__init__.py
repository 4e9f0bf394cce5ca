"""The format-neutral block layer: contracts, nodes, chains, splitting, probing."""

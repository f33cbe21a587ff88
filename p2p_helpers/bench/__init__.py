"""What the methods of this package cost against plain generation: `python -m p2p_helpers.bench control`."""

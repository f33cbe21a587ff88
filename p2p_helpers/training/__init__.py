"""How the bundled models were trained: autoencoder, text to image, oracle; one loop for all three."""

import os

# Read when torch is first imported. Threads that spin while they wait make training several times slower as soon as
# anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""How a pool looks from outside: for the command line, notebooks and whoever asks."""

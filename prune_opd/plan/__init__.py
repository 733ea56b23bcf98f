"""Memory and time of a recipe on given GPUs, before one is taken: `prune-opd plan`. No torch in here."""

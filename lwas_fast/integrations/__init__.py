"""What trainers ask for beyond `AdamWLW(model)`; each module needs its trainer installed."""

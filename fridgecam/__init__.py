"""FridgeCam: a camera that names what is in the fridge, and learns from its owner's photographs."""

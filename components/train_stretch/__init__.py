"""The component `train_stretch`: iterations in a row by ranks that keep the base loaded."""

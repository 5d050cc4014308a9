"""Every record that crosses a step: recipe, manifest, trajectory, score. Standard library and pydantic only."""

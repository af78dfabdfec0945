"""The tree codec's public names."""

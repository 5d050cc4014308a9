"""From images to a campaign's sources."""

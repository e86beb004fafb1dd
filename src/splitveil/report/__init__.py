"""One look for every report: a single HTML file that works without a network."""

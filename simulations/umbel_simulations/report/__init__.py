"""What a run looks like to people: an HTML page that needs nothing else, and the figures that it shares with tables."""

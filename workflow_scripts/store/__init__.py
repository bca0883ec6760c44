"""Results addressed by what they are made from, and their atomic commit."""

"""The study: which runs there are, what they came to, and what the reports say."""

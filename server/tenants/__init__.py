"""Who may ask what, how much of it, and what they have used."""

"""A plan in the words of other people's trainers; one module a trainer."""

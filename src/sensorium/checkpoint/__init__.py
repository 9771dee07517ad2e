"""A model folder's files, read without torch: where they are and what they say."""

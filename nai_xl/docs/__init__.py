"""The pages that say what can be chosen, written from conf/ and the functions that it names."""

"""The methods: one paper, one file, named as the paper is known."""

"""The programs of the study, which run by themselves."""

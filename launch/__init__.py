"""The programs: each module here is one, with absl flags; the folders hold what several of them share."""

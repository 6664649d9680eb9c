"""The subcommand `fit`: fits a task's judge to a file of labelled texts."""

"""The subcommand `fit`: makes a task's judge from a file of labelled texts."""

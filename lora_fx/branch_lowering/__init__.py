"""How an unmerged branch is computed: the forms, what each costs, and how it is written."""

"""A trained mixture made smaller: experts removed, merged, taught by a teacher, kept in fewer bits."""

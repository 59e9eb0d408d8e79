"""What people see: each subject's `Table` built once, written as text, HTML, Markdown or frame."""

"""``report.html``: a run on one page.

May be imported by the loop and the commands.
"""

"""Commands that only show or copy: nothing is decoded or trained."""

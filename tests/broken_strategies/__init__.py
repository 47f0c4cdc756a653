"""One deliberately broken strategy for each check of the conformance kit, and a healthy one for comparison.

Each breaks one promise and keeps the others. They are grouped as the checks are, by level. The package imports none of them, so that
the one that misbehaves on import stays alone.
"""

from .upstream import from_upstream, is_upstream, to_upstream

__all__ = ['from_upstream', 'is_upstream', 'to_upstream']

"""The strategy ``template`` for GIFt."""

from gift_template_plugin.strategy import TemplateStrategy

__all__ = ["TemplateStrategy"]

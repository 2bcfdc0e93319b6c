"""The systems, one folder and one line of registration each."""

from maskx.engine.system import register_system

register_system("maskx", "maskx.systems.maskx_rcnn.system:SYSTEM")
register_system("class_patterns", "maskx.systems.class_patterns.system:SYSTEM")
register_system("transfernet", "maskx.systems.transfernet.system:SYSTEM")
register_system("larvseg", "maskx.systems.larvseg.system:SYSTEM")
register_system("concept_mask", "maskx.systems.concept_mask.system:SYSTEM")

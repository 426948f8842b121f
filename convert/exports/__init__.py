"""Exports: an artifact → a folder that one platform deploys as it stands.

artifact.py     what is to be exported: its kind, its files, what its certificate says
package.py      what an export consists of, and what may be asked for
<platform>.py   artifact + request → Package, or Refused with what to convert to
platforms.py    the platforms by name
write.py        a Package → the folder, copied, hashed, with a manifest
"""

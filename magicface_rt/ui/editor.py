"""The HTML in which a photograph is dropped and its mask painted; assets/page.js makes it work."""

from __future__ import annotations

__all__ = ["editor_html"]

ACCEPTED = "image/png,image/jpeg,image/webp"


def editor_html(slot: int, pixels: int) -> str:
    """Return the editor of one concept. pixels: larger photographs are sent, but not drawn in the browser."""
    return f"""\
<div class="mf-editor" data-slot="{slot}" data-pixels="{pixels}">
  <div class="mf-drop">
    <label class="mf-file">Choose a photograph<span class="mf-hidden"> of concept {slot}</span>
      <input class="mf-photo" type="file" accept="{ACCEPTED}" aria-describedby="mf-hint-{slot}">
    </label>
    <p id="mf-hint-{slot}" class="mf-hint">or drop a PNG, JPEG or WebP file here.</p>
  </div>
  <div class="mf-paint" hidden>
    <canvas class="mf-canvas" tabindex="0" role="application"
      aria-label="Mask of concept {slot}. Paint over what belongs to it. Arrow keys move the brush, space paints,
 e changes between brush and eraser, plus and minus change the brush, z takes back."></canvas>
    <div class="mf-tools" role="group" aria-label="Tools for the mask of concept {slot}">
      <label class="mf-brush">Brush <input class="mf-size" type="range" min="1" max="100" value="30"></label>
      <button type="button" class="mf-erase" aria-pressed="false">Eraser</button>
      <button type="button" class="mf-undo">Undo</button>
      <button type="button" class="mf-fill">Paint all</button>
      <button type="button" class="mf-clear">Clear</button>
      <button type="button" class="mf-save">Save mask</button>
      <label class="mf-file">Load a mask<span class="mf-hidden"> for concept {slot}</span>
        <input class="mf-mask" type="file" accept="{ACCEPTED}">
      </label>
    </div>
  </div>
  <p class="mf-note" role="status"></p>
</div>"""

// Says why the last token was refused, and goes back to the page's own theme.
import { applyTheme } from "./theme.js";

const REASONS = {
  unknown: "The server does not know this token.",
  role: "This token is for actors; the page requires one with the role learner or admin.",
};

applyTheme();
const reason = REASONS[new URLSearchParams(location.search).get("refused")];
if (reason) {
  const note = document.getElementById("refused");
  note.textContent = reason;
  note.hidden = false;
}

// The page and its theme.
try { const kept = localStorage.getItem("theme"); if (kept) document.documentElement.dataset.theme = kept; } catch { /* a file may have no storage */ }
const page = new Live(document.getElementById("main"));
const theme = () => page.view.theme();

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* as above */ }
  theme();
});
const terms = document.getElementById("terms");
terms.append(
  element("header", {}, element("h2", {}, "Terms"), element("div.tools", {}, element("button.quiet", { type: "button", onclick: () => terms.close() }, "close"))),
  element("dl", {}, ...Object.entries(TERMS).flatMap(([term, meaning]) => [element("dt", {}, term), element("dd", {}, meaning)])),
);
document.getElementById("help").addEventListener("click", () => terms.showModal());
terms.addEventListener("click", (event) => { if (event.target === terms) terms.close(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
window.hybridcache = page;

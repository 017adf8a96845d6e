// Runs before anything else: the theme, the token, and the request for the run's picture, which then comes while the
// charts' library is read.

const theme = localStorage.getItem("theme"); // a chosen theme must not flash the other one
if (theme) document.documentElement.dataset.theme = theme;

// The token comes in the link's fragment, which no browser sends to a server. It is taken out of the address, so that it
// is in no bookmark and on no screenshot.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname + location.search);
}

const known = sessionStorage.getItem("token");
window.firstPicture = fetch("api/history?axis=step", {
  headers: known ? { Authorization: `Bearer ${known}` } : {},
  cache: "no-store",
});

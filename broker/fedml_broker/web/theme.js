// SPDX-License-Identifier: Apache-2.0
// Before anything is painted: the theme that was chosen here; without a choice, the system's.
const chosen = localStorage.getItem("theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;

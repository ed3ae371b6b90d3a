"use strict";
// The viewer shows what the grid of reconstructions already holds, one image at a time and large.
for (const viewer of document.querySelectorAll(".viewer")) {
  const pairs = [...viewer.nextElementSibling.querySelectorAll(".pair")];
  const slider = viewer.querySelector("input[type=range]");
  const radios = [...viewer.querySelectorAll("input[type=radio]")];
  const picture = viewer.querySelector("img");
  const caption = viewer.querySelector("figcaption");
  const show = () => {
    const pair = pairs[Number(slider.value)];
    const view = radios.find((radio) => radio.checked);
    const image = pair.querySelectorAll("img")[Number(view.value)];
    picture.src = image.src;
    picture.alt = image.alt;
    caption.textContent = `${Number(slider.value) + 1} of ${pairs.length}: ${pair.querySelector("figcaption").textContent.trim()}`;
  };
  slider.addEventListener("input", show);
  for (const radio of radios) radio.addEventListener("change", show);
  pairs.forEach((pair, number) => {
    pair.addEventListener("click", () => {
      slider.value = String(number);
      show();
      viewer.scrollIntoView({ block: "nearest" });
    });
  });
  viewer.hidden = false;
  show();
}

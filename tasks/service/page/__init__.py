"""The page of a service: page.html, page.css and page.js, put together as they are served."""
